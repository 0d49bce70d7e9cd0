-- ARGV: inc, name, born
local gone = known(ARGV[1], ARGV[2], ARGV[3])
if gone then return gone end
local name = ARGV[2]
local m = call('HMGET', M, 'age', 'bytes_max', 'last')
expire(m[1], tonumber(m[2] or '0') > 0)
local s, err = stat()
if err then return err end
if not s then return {'ok', '0-0', m[3] or '0-0', '', 0, '', '0', '', 0, -1} end
local count, low = settle_gone(name, s.first)
local at, _, g = cursor(name)
local lag = -1
for i = 1, #g, 2 do if g[i] == 'lag' and g[i + 1] then lag = g[i + 1] end end
local last = s.last
if m[3] and before(last, m[3]) then last = m[3] end
local e = call('XRANGE', S, '(' .. at, '+', 'COUNT', 1)[1]
return {'ok', at, last, s.first or '', count, count > 0 and low or '', call('HGET', B .. 'group:' .. name, 'moved'),
  e and text(math.max(now_ms() - time_of(e), 0)) or '', s.len, lag}
