-- ARGV: inc, name, born, limit. What is due, where the consumer stands, how much room it has.
local gone = known(ARGV[1], ARGV[2], ARGV[3])
if gone then return gone end
local name, limit = ARGV[2], tonumber(ARGV[4])
local G, D = B .. 'group:' .. name, B .. 'due:' .. name
local m = call('HMGET', M, 'age', 'bytes_max', 'wake', 'last', 'big')
expire(m[1], tonumber(m[2] or '0') > 0)
local s, err = stat()
if err then return err end
if not s then return {'ok', {}, '0-0', '0-0', 0, '0', m[3] or '0-0', ''} end
local count = settle_gone(name, s.first)
local g = call('HMGET', G, 'due_at', 'ack', 'most')
local clock, due, ack = now_ms(), {}, tonumber(g[2])
local function add(id, times, back)
  due[#due + 1] = {id, times, back}
end
if count > 0 then
  for _, id in ipairs(call('ZRANGEBYSCORE', D, '-inf', clock, 'LIMIT', 0, limit)) do
    local e = call('XPENDING', S, name, id, id, 1)[1]
    if e then add(id, e[4], 1) else call('ZREM', D, id) end
  end
  local at = tonumber(g[1] or '0')
  if at <= clock then
    local more = false
    for _, owner in ipairs({'mist', 'mist:dead'}) do
      local es = call('XPENDING', S, name, 'IDLE', g[2], '-', '+', limit, owner)
      for _, e in ipairs(es) do add(e[1], e[4], 0) end
      more = more or #es == limit
    end
    -- looking through all leases costs; after one look the next waits a little
    if not more and #due == 0 then
      pcall_('HSET', G, 'due_at', text(clock + math.min(math.max(math.floor(ack / 20), 5), 500)))
    end
  end
  table.sort(due, function(a, b) return before(a[1], b[1]) end)
end
local next_due = tonumber(call('HGET', G, 'due_at') or '0')
if count == 0 then next_due = 0 end
local z = call('ZRANGE', D, 0, 0, 'WITHSCORES')
if z[2] and (next_due == 0 or tonumber(z[2]) < next_due) then next_due = tonumber(z[2]) end
local last = s.last
if m[4] and before(last, m[4]) then last = m[4] end
while #due > limit do due[#due] = nil end
return {'ok', due, cursor(name), last, tonumber(g[3]) - count, next_due > 0 and text(next_due - clock) or '',
  m[3] or '0-0', s.first or '', tonumber(m[5] or '0')}
