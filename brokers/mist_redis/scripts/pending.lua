-- ARGV: inc, name, born, from id, limit: {id, times, ms until due} …
local gone = known(ARGV[1], ARGV[2], ARGV[3])
if gone then return gone end
local name = ARGV[2]
local D = B .. 'due:' .. name
local m = call('HMGET', M, 'age', 'bytes_max')
expire(m[1], tonumber(m[2] or '0') > 0)
local s, err = stat()
if err then return err end
if not s then return {'ok', {}} end
settle_gone(name, s.first)
local out, clock, ack = {}, now_ms(), tonumber(call('HGET', B .. 'group:' .. name, 'ack'))
for _, e in ipairs(call('XPENDING', S, name, ARGV[4], '+', ARGV[5])) do
  local due = ack - e[3]
  if e[2] == 'mist:back' then due = tonumber(call('ZSCORE', D, e[1]) or clock) - clock end
  out[#out + 1] = {e[1], e[4], text(due)}
end
return {'ok', out}
