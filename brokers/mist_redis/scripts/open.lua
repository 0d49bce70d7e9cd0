-- ARGV: create ('1' or ''), incarnation, created (ns), configuration as JSON, then field, value … for the scripts
local kind = call('TYPE', S).ok
if kind ~= 'none' and kind ~= 'stream' then return {'type', kind} end
local m = call('HMGET', M, 'inc', 'config', 'created', 'big')
if m[1] then return {'found', m[1], m[2], m[3], tonumber(m[4] or '0')} end
if kind == 'stream' then return {'foreign'} end
if ARGV[1] ~= '1' then return {'absent'} end
-- what a foreign stream of this name, gone since, left behind must not be taken for ours
for _, name in ipairs(call('HKEYS', B .. 'groups')) do call('UNLINK', B .. 'group:' .. name, B .. 'due:' .. name) end
call('UNLINK', M, B .. 'groups', B .. 'ids:0', B .. 'ids:1', B .. 'checkpoints')
call('XGROUP', 'CREATE', S, ':', '0-0', 'MKSTREAM')
call('XGROUP', 'DESTROY', S, ':')
-- the deletion of a former one may still stand in the key that waiters watch: this one begins behind it
local w = call('XREVRANGE', B .. 'wake', '+', '-', 'COUNT', 1)[1]
call('HSET', M, 'inc', ARGV[2], 'created', ARGV[3], 'config', ARGV[4], 'last', '0-0', 'wake', w and w[1] or '0-0',
  unpack(ARGV, 5))
return {'made', ARGV[2], ARGV[4], ARGV[3], 0}
