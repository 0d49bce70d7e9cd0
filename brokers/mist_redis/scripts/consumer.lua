-- ARGV: inc, name, create ('1' or ''), born, configuration as JSON, start id, ack wait (ms), pending_max
local gone = known(ARGV[1])
if gone then return gone end
local name = ARGV[2]
local G = B .. 'group:' .. name
local g = call('HMGET', G, 'born', 'config')
if g[1] then return {'found', g[1], g[2]} end
if ARGV[3] ~= '1' then return {'absent'} end
local s, err = stat()
if err then return err end
local last = s and s.last or '0-0'
local known_last = call('HGET', M, 'last')
if known_last and before(last, known_last) then last = known_last end
if before(last, ARGV[6]) then return {'ahead', last} end
if s then
  if cursor(name) then return {'foreign'} end
end
call('XGROUP', 'CREATE', S, name, ARGV[6], 'MKSTREAM')
local _, read = cursor(name)
if read ~= nil and ARGV[1] ~= '' and read_at(ARGV[6]) then set_cursor(name, ARGV[6], read_at(ARGV[6])) end
call('HSET', G, 'born', ARGV[4], 'seeks', 0, 'moved', 0, 'config', ARGV[5], 'ack', ARGV[7], 'most', ARGV[8])
call('HSET', B .. 'groups', name, ARGV[4])
return {'made', ARGV[4], ARGV[5]}
