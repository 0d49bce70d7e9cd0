-- ARGV: inc, the id before which everything goes, the id before that one
local gone = known(ARGV[1])
if gone then return gone end
local m = call('HMGET', M, 'last', 'bytes_max')
local s, err = stat()
if err then return err end
local last = s and s.last or '0-0'
if m[1] and before(last, m[1]) then last = m[1] end
if before(last, ARGV[3]) then return {'ahead', last} end
if not s then return {'ok', 0} end
local n = drop(ARGV[2], tonumber(m[2] or '0') > 0)
if n > 0 then wake() end
return {'ok', n}
