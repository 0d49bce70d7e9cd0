-- ARGV: inc, name, born, what ('seek' or 'delete'), id
local gone = known(ARGV[1], ARGV[2], ARGV[3])
if gone then return gone end
local name, id = ARGV[2], ARGV[5]
local G = B .. 'group:' .. name
local s, err = stat()
if err then return err end
if ARGV[4] == 'seek' then
  local last = s and s.last or '0-0'
  local known_last = call('HGET', M, 'last')
  if known_last and before(last, known_last) then last = known_last end
  if before(last, id) then return {'ahead', last} end
  if s and not s.first then
    -- everything is gone: go on behind it
    id = before(id, last) and last or id
  end
end
if s then call('XGROUP', 'DESTROY', S, name) end
call('UNLINK', B .. 'due:' .. name)
if ARGV[4] == 'delete' then
  call('UNLINK', G)
  call('HDEL', B .. 'groups', name)
else
  call('XGROUP', 'CREATE', S, name, id, 'MKSTREAM')
  local _, read = cursor(name)
  if read ~= nil and ARGV[1] ~= '' and read_at(id) then set_cursor(name, id, read_at(id)) end
  call('HINCRBY', G, 'seeks', 1)
  call('HSET', G, 'moved', 0)
  call('HDEL', G, 'due_at', 'held', 'held_read')
end
wake()
return {'ok'}
