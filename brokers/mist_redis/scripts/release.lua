-- after the XREADGROUP of guard.lua; ARGV: name
local G = B .. 'group:' .. ARGV[1]
local g = call('HMGET', G, 'held', 'held_read', 'due_at', 'ack')
if g[1] then
  set_cursor(ARGV[1], g[1], g[2] ~= '' and g[2] ~= 'false' and g[2] or nil)
  call('HDEL', G, 'held', 'held_read')
elseif g[4] and not g[3] and call('XPENDING', S, ARGV[1])[1] > 0 then
  call('HSET', G, 'due_at', text(now_ms() + tonumber(g[4])))
end
return 1
