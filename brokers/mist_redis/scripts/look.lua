-- what every read asks: {inc, last id, first id, length, wake, largest, entries ever added}
local m = call('HMGET', M, 'inc', 'age', 'bytes_max', 'wake', 'big', 'last')
expire(m[2], tonumber(m[3] or '0') > 0)
local s, err = stat()
if err then return err end
if not s and not m[1] then return {'gone'} end
s = s or {len = 0, last = '0-0', added = 0}
if m[6] and before(s.last, m[6]) then s.last = m[6] end
return {'ok', m[1] or '', s.last, s.first or '', s.len, m[4] or '0-0', tonumber(m[5] or '0'), s.added}
