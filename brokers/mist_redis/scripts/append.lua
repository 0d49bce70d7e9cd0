-- ARGV[1]: msgpack {inc, expected last id or '', subjects, ids or 0, headers or 0, bytes, largest}; then one data each
local p = cmsgpack.unpack(ARGV[1])
local subjects, ids, headers = p[3], p[4], p[5]
local count = #ARGV - 1
local m = call('HMGET', M, 'inc', 'last', 'time', 'age', 'bytes_max', 'records_max', 'full', 'win', 'win_n', 'gen',
  'gen_at', 'gen_n', 'bytes', 'big')
if (m[1] or '') ~= p[1] then return {'gone'} end
local own = m[1] and true or false
if not own and call('EXISTS', S) == 0 then return {'gone'} end
local clock = now_ms()
local ms = math.max(clock, tonumber(m[3] or '0'))
local bytes_max, records_max = tonumber(m[5] or '0'), tonumber(m[6] or '0')

-- known ids: two generations, each at most one window old and one window long
local win, win_n = tonumber(m[8] or '120000'), tonumber(m[9] or '100000')
local gen, gen_at, gen_n = m[10] or '0', tonumber(m[11] or '0'), tonumber(m[12] or '0')
local dedupe = ids ~= 0 and win > 0 and win_n > 0
local turn, stale = false, false
local seen = {}
if dedupe then
  stale = clock - gen_at >= 2 * win
  turn = stale or clock - gen_at >= win or gen_n >= win_n
  local function look(g)
    for at = 1, count, 1000 do
      local r = call('HMGET', B .. 'ids:' .. g, unpack(ids, at, math.min(at + 999, count)))
      for i = 1, #r do
        if r[i] and ids[at + i - 1] ~= '' then seen[ids[at + i - 1]] = r[i] end
      end
    end
  end
  if not stale then
    if not turn then look(gen == '0' and '1' or '0') end
    look(gen)
  end
end

local fresh, dups, total = {}, {}, 0
if dedupe then
  local mine = {}
  for i = 1, count do
    local id = ids[i]
    if id ~= '' and (seen[id] or mine[id]) then
      dups[#dups + 1] = i
    else
      fresh[#fresh + 1] = i
      total = total + #ARGV[i + 1]
      if id ~= '' then mine[id] = true end
    end
  end
else
  for i = 1, count do fresh[i] = i end
  total = p[6]
end

-- the top of the stream: ours from the meta hash, unless others write here too
local last = m[2] or '0-0'
local function look_again()
  local s, err = stat()
  if err then return err end
  if s and before(last, s.last) then last = s.last end
end
if p[2] ~= '' or not own or string.sub(last, 1, 2) ~= '0-' then
  local err = look_again()
  if err then return err end
end
if #fresh > 0 and p[2] ~= '' and p[2] ~= last then return {'wrong', last} end

if #fresh > 0 then
  expire(m[4], bytes_max > 0)
  if m[7] == 'refuse' and (bytes_max > 0 or records_max > 0) then
    local has = tonumber(call('HGET', M, 'bytes') or '0')
    if records_max > 0 and call('XLEN', S) + #fresh > records_max then return {'full'} end
    if bytes_max > 0 and has + total > bytes_max then return {'full'} end
  end
end

local one_subject = type(subjects) == 'string'
local head, n
local function number()
  local lm, ln = parts(last)
  if own and lm == '0' then
    head, n = '0-', tonumber(ln)
    return
  end
  -- somebody's `XADD *` came in between: go on after the top id, by the server's clock
  local tm = math.max(clock, tonumber(lm))
  n = tm == tonumber(lm) and tonumber(ln) or -1
  if n + count >= 1048576 then tm, n = tm + 1, -1 end
  head = text(tm) .. '-'
  ms = math.max(ms, tm)
  return tm >= 8796093022208
end
if number() then return {'unmappable', last} end

local stamp = text(ms)
local function add(i, id)
  local s = one_subject and subjects or subjects[i]
  local d = ARGV[i + 1]
  local key = ids ~= 0 and ids[i] ~= '' and ids[i]
  local h = headers ~= 0 and headers[i] ~= '' and headers[i]
  if key then
    if h then return pcall_('XADD', S, id, 'subject', s, 'data', d, 'id', key, 'time', stamp, 'headers_json', h) end
    return pcall_('XADD', S, id, 'subject', s, 'data', d, 'id', key, 'time', stamp)
  end
  if h then return pcall_('XADD', S, id, 'subject', s, 'data', d, 'time', stamp, 'headers_json', h) end
  return pcall_('XADD', S, id, 'subject', s, 'data', d, 'time', stamp)
end

local from = n
for k = 1, #fresh do
  local r = add(fresh[k], head .. text(n + 1))
  if r.err then
    if k > 1 or not string.find(r.err, 'equal or smaller', 1, true) then return r end
    local err = look_again()
    if err then return err end
    if number() then return {'unmappable', last} end
    from = n
    stamp = text(ms)
    r = add(fresh[k], head .. text(n + 1))
    if r.err then return r end
  end
  n = n + 1
end

local function reply()
  local out = {'ok', head, from + 1, #fresh}
  for _, i in ipairs(dups) do
    out[#out + 1] = i - 1
    out[#out + 1] = seen[ids[i]]
  end
  return out
end

if #fresh > 0 then
  last = head .. text(n)
  local set = {'HSET', M, 'last', last, 'time', stamp}
  if p[7] > tonumber(m[14] or '0') then
    set[#set + 1] = 'big'
    set[#set + 1] = p[7]
  end
  if dedupe then
    if turn then
      if stale then call('UNLINK', B .. 'ids:' .. gen) end
      gen = gen == '0' and '1' or '0'
      call('UNLINK', B .. 'ids:' .. gen)
      gen_at, gen_n = clock, 0
    end
    local hset, stored = {'HSET', B .. 'ids:' .. gen}, 0
    for k = 1, #fresh do
      local id = ids[fresh[k]]
      if id ~= '' then
        stored = stored + 1
        seen[id] = head .. text(from + k)
        hset[#hset + 1] = id
        hset[#hset + 1] = seen[id]
        if #hset >= PIECE then
          call(unpack(hset))
          hset = {'HSET', B .. 'ids:' .. gen}
        end
      end
    end
    if #hset > 2 then call(unpack(hset)) end
    if stored > 0 then
      if gen_n == 0 then call('PEXPIRE', B .. 'ids:' .. gen, text(2 * win + 1000)) end
      for _, v in ipairs({'gen', gen, 'gen_at', text(gen_at), 'gen_n', text(gen_n + stored)}) do set[#set + 1] = v end
    end
  end
  call(unpack(set))
  if bytes_max > 0 then call('HINCRBY', M, 'bytes', total) end
  if m[7] ~= 'refuse' then
    local gone = 0
    if records_max > 0 then
      local over = call('XLEN', S) - records_max
      if over > 0 then
        if bytes_max > 0 then
          local e = call('XRANGE', S, '-', '+', 'COUNT', over + 1)
          gone = drop(e[over + 1] and e[over + 1][1], true)
        else
          gone = call('XTRIM', S, 'MAXLEN', '=', records_max)
        end
      end
    end
    if bytes_max > 0 then
      local over = tonumber(call('HGET', M, 'bytes')) - bytes_max
      while over > 0 do
        local es, keep = call('XRANGE', S, '-', '+', 'COUNT', 200), nil
        for i = 1, #es do
          if over <= 0 or es[i][1] == last then keep = es[i][1] break end
          local f = es[i][2]
          for j = 1, #f, 2 do if f[j] == 'data' then over = over - #f[j + 1] end end
          keep = i == #es and '' or nil
        end
        if keep == '' then
          -- the whole piece goes: up to the entry behind it
          local e = call('XRANGE', S, '(' .. es[#es][1], '+', 'COUNT', 1)[1]
          keep = e and e[1]
        end
        if not keep then break end
        local went = drop(keep, true)
        gone = gone + went
        if went == 0 or keep == last then break end
      end
    end
    if gone > 0 then wake() end
  end
end
return reply()
