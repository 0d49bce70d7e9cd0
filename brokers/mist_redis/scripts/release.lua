-- after the XREADGROUP of guard.lua; ARGV: name, '1' when a look at the stream is light. Where nothing is left to give:
-- {last id, wake, ms until something is due or ''}
local name = ARGV[1]
local G = B .. 'group:' .. name
local g = call('HMGET', G, 'held', 'held_read', 'due_at', 'ack')
if g[1] then
  set_cursor(name, g[1], g[2] ~= '' and g[2] ~= 'false' and g[2] or nil)
  call('HDEL', G, 'held', 'held_read')
  return 0
end
if not g[4] then return 0 end
local count, due = call('XPENDING', S, name)[1], tonumber(g[3] or '0')
if count > 0 and due == 0 then
  due = now_ms() + tonumber(g[4])
  pcall_('HSET', G, 'due_at', text(due)) -- without memory it is set by a later fetch
end
if ARGV[2] ~= '1' then return 0 end
local s = stat()
if not s or before(cursor(name), s.last) then return 0 end
if count > 0 then
  local z = call('ZRANGE', B .. 'due:' .. name, 0, 0, 'WITHSCORES')
  if z[2] and tonumber(z[2]) < due then due = tonumber(z[2]) end
end
return {s.last, call('HGET', M, 'wake') or '0-0', count > 0 and text(due - now_ms()) or ''}
