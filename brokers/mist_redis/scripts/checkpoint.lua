-- KEYS[1]: the hash; ARGV: name, incarnation, sequence in 19 digits, force ('1' or ''). Values: incarnation, sequence, time
local t = call('TIME')
local stored = call('HGET', S, ARGV[1])
if stored and ARGV[4] ~= '1' then
  local v = cmsgpack.unpack(stored)
  if v[1] ~= ARGV[2] or ARGV[3] < v[2] then return {'no', v[1], v[2], v[3]} end
end
local stamp = t[1] .. string.format('%06d', tonumber(t[2])) .. '000'
call('HSET', S, ARGV[1], cmsgpack.pack({ARGV[2], ARGV[3], stamp}))
return {'ok', stamp}
