-- ARGV: inc, then the ids to erase. Their ids leave the window, and every consumer of ours forgets them.
local gone = known(ARGV[1])
if gone then return gone end
local bounded = tonumber(call('HGET', M, 'bytes_max') or '0') > 0
local ids, size = {}, 0
for at = 2, #ARGV do
  local e = call('XRANGE', S, ARGV[at], ARGV[at])[1]
  if e then
    ids[#ids + 1] = e[1]
    local f = e[2]
    for j = 1, #f, 2 do
      if f[j] == 'data' then size = size + #f[j + 1] end
      if f[j] == 'id' then
        for _, gen in ipairs({'0', '1'}) do
          if call('HGET', B .. 'ids:' .. gen, f[j + 1]) == e[1] then call('HDEL', B .. 'ids:' .. gen, f[j + 1]) end
        end
      end
    end
  end
end
if #ids > 0 then
  each(ids, {'XDEL', S})
  if bounded and size > 0 then call('HINCRBY', M, 'bytes', -size) end
end
-- also of those that are gone already: whoever removed them may have left them pending
local asked = {}
for at = 2, #ARGV do asked[#asked + 1] = ARGV[at] end
if call('EXISTS', S) == 1 then
  for _, name in ipairs(call('HKEYS', B .. 'groups')) do
    each(asked, {'XACK', S, name})
    each(asked, {'ZREM', B .. 'due:' .. name})
  end
end
wake()
return {'ok', #ids}
