-- before an XREADGROUP in the same transaction; ARGV: inc, name, born, count, largest record the caller reckons with.
-- When that read would not be right, the group's cursor is put at the end of all ids, so that it gives nothing, and
-- release.lua puts it back.
local name = ARGV[2]
local G = B .. 'group:' .. name
local m = call('HMGET', M, 'inc', 'age', 'bytes_max', 'big', 'wake')
local g = call('HMGET', G, 'born', 'seeks', 'moved', 'due_at', 'most')
local function no(why)
  local id, read = cursor(name)
  if id then
    -- in this order: a server without memory refuses a script's first write when it stores, and no later one
    set_cursor(name, TOP .. '-' .. TOP, read)
    call('HSET', G, 'held', id, 'held_read', read == nil and '' or tostring(read))
  end
  return {why}
end
if (m[1] or '') ~= ARGV[1] then return no('gone') end
if g[1] ~= ARGV[3] then return no('nobody') end
expire(m[2], tonumber(m[3] or '0') > 0)
local p = call('XPENDING', S, name)
if p[1] + tonumber(ARGV[4]) > tonumber(g[5]) then return no('slow') end
if p[1] > 0 then
  if #call('XRANGE', S, p[2], p[2]) == 0 then return no('slow') end
  local clock = now_ms()
  if g[4] and tonumber(g[4]) <= clock then return no('slow') end
  local z = call('ZRANGE', B .. 'due:' .. name, 0, 0, 'WITHSCORES')
  if z[2] and tonumber(z[2]) <= clock then return no('slow') end
elseif g[4] then
  call('HDEL', G, 'due_at')
end
if tonumber(m[4] or '0') > tonumber(ARGV[5]) then return no('slow') end
return {'ok', g[2], g[3], m[5] or '0-0'}
