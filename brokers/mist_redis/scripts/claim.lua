-- ARGV: inc, name, born, msgpack {cursor expected, cursor to set, entries passed, new runs, due {id, times …}, spent {…}}
local gone = known(ARGV[1], ARGV[2], ARGV[3])
if gone then return gone end
local name = ARGV[2]
local G, D = B .. 'group:' .. name, B .. 'due:' .. name
local p = cmsgpack.unpack(ARGV[4])
local at, read = cursor(name)
if not at then return {'nobody'} end
local g = call('HMGET', G, 'seeks', 'moved', 'due_at', 'ack', 'most')
if p[2] ~= '' and at ~= p[1] then return {'moved', at} end
local ids = ids_of(p[4])
if #ids > 0 and call('XPENDING', S, name)[1] + #ids > tonumber(g[5]) then return {'room'} end
local clock, moved = now_ms(), false
local function take(list, owner, more)
  local taken = {}
  for i = 1, #list, 2 do
    local id, times = list[i], list[i + 1]
    local e = call('XPENDING', S, name, id, id, 1)[1]
    if e and e[4] == times then
      local z = call('ZSCORE', D, id)
      local is = e[2] == 'mist:back' and (not z or tonumber(z) <= clock)
        or e[2] ~= 'mist:back' and e[3] >= tonumber(g[4])
      if is then
        call('XCLAIM', S, name, owner, 0, id, 'RETRYCOUNT', times + more, 'JUSTID')
        if z then call('ZREM', D, id) end
        taken[#taken + 1] = id
        moved = true
      end
    end
  end
  return taken
end
local due, spent = take(p[5], 'mist', 1), take(p[6], 'mist:dead', 0)
if moved then g[2] = call('HINCRBY', G, 'moved', 1) end
if #ids > 0 then
  each(ids, {'XCLAIM', S, name, 'mist', 0}, {'RETRYCOUNT', 1, 'FORCE', 'JUSTID'})
end
if p[2] ~= '' then
  set_cursor(name, p[2], read and text(tonumber(read) + p[3]) or nil)
end
local until_ = clock + tonumber(g[4])
if (#due > 0 or #ids > 0) and (not g[3] or tonumber(g[3]) > until_) then call('HSET', G, 'due_at', text(until_)) end
return {'ok', g[1], tostring(g[2]), due, spent}
