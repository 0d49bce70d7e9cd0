-- ARGV: inc, time in ms
local m = call('HMGET', M, 'inc', 'age', 'bytes_max', 'last')
local gone = known(ARGV[1])
if gone then return gone end
expire(m[2], tonumber(m[3] or '0') > 0)
local s, err = stat()
if err then return err end
local last = s and s.last or '0-0'
if m[4] and before(last, m[4]) then last = m[4] end
return {'ok', s and at_time(tonumber(ARGV[2])) or '', last}
