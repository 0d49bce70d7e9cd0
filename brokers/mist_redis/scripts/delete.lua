local kind = call('TYPE', S).ok
local inc = call('HGET', M, 'inc')
if kind ~= 'stream' and not inc then return {'absent', kind} end
for _, name in ipairs(call('HKEYS', B .. 'groups')) do
  call('UNLINK', B .. 'group:' .. name, B .. 'due:' .. name)
end
-- waiting readers wake, look, and find nothing; the key they wait on goes later
call('XADD', B .. 'wake', 'MAXLEN', '=', 1, '*', 'w', '1')
call('EXPIRE', B .. 'wake', 60)
if kind == 'stream' then call('UNLINK', S) end
call('UNLINK', M, B .. 'groups', B .. 'ids:0', B .. 'ids:1', B .. 'checkpoints')
return {'ok'}
