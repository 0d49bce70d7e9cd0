local S, M = KEYS[1], KEYS[2]
local B = M and string.sub(M, 1, -5) or ''
local call, pcall_ = redis.call, redis.pcall
local TOP = '18446744073709551615'

local function text(n) return string.format('%.0f', n) end

-- milliseconds of the server's clock
local function now_ms()
  local t = call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function parts(id)
  local ms, n = string.match(id, '^(%d+)-(%d+)$')
  return ms, n
end

-- whether id a comes before id b, exact for every id
local function before(a, b)
  local am, an = parts(a)
  local bm, bn = parts(b)
  if am ~= bm then
    if #am ~= #bm then return #am < #bm end
    return am < bm
  end
  if #an ~= #bn then return #an < #bn end
  return an < bn
end

-- length, last id and first id of the stream; nil when there is none, then perhaps the error reply
local function stat()
  local r = pcall_('XINFO', 'STREAM', S)
  if r.err then
    if string.find(r.err, 'no such key', 1, true) then return nil end
    return nil, r
  end
  local out = {len = 0, last = '0-0', added = -1}
  for i = 1, #r, 2 do
    local k, v = r[i], r[i + 1]
    if k == 'length' then out.len = v
    elseif k == 'last-generated-id' then out.last = v
    elseif k == 'entries-added' then out.added = v
    elseif k == 'first-entry' then out.first = v and v[1]
    end
  end
  return out
end

-- milliseconds of an entry: of ours its field, of others' (and ours beside them) its id
local function time_of(e)
  local ms = parts(e[1])
  if ms ~= '0' then return tonumber(ms) end
  local f = e[2]
  for i = 1, #f, 2 do
    if f[i] == 'time' then return tonumber(f[i + 1]) or 0 end
  end
  return 0
end

-- the id of the first entry at or after this time, false when there is none
local function at_time(ms)
  local own = call('XREVRANGE', S, '0-' .. TOP, '0-0', 'COUNT', 1)[1]
  if own and time_of(own) >= ms then
    local low = call('XRANGE', S, '0-0', '+', 'COUNT', 1)[1]
    local _, a = parts(low[1])
    local _, b = parts(own[1])
    local lo, hi, found = tonumber(a), tonumber(b), own[1]
    while lo <= hi do
      local mid = math.floor((lo + hi) / 2)
      local e = call('XRANGE', S, '0-' .. text(mid), own[1], 'COUNT', 1)[1]
      if time_of(e) >= ms then
        found = e[1]
        hi = mid - 1
      else
        local _, n = parts(e[1])
        lo = tonumber(n) + 1
      end
    end
    return found
  end
  local e = call('XRANGE', S, text(math.max(ms, 1)) .. '-0', '+', 'COUNT', 1)[1]
  return e and e[1]
end

-- remove everything before an id (all with false); the bytes are counted where a bound needs them
local function drop(id, bounded)
  local size = 0
  if bounded then
    local from = '-'
    while true do
      local es = call('XRANGE', S, from, '+', 'COUNT', 200)
      for i = 1, #es do
        if id and not before(es[i][1], id) then es = {} break end
        local f = es[i][2]
        for j = 1, #f, 2 do if f[j] == 'data' then size = size + #f[j + 1] end end
      end
      if #es == 0 then break end
      from = '(' .. es[#es][1]
    end
  end
  local n
  if id then n = call('XTRIM', S, 'MINID', '=', id) else n = call('XTRIM', S, 'MAXLEN', '=', 0) end
  if size > 0 then call('HINCRBY', M, 'bytes', -size) end
  return n
end

-- wake whoever waits for something else than a new entry
local function wake()
  call('HSET', M, 'wake', call('XADD', B .. 'wake', 'MAXLEN', '=', 1, '*', 'w', '1'))
end

-- records older than the stream keeps them go; the first one that stays is looked at first
local function expire(age, bounded)
  if not age or age == '' or age == '0' then return end
  local e = call('XRANGE', S, '-', '+', 'COUNT', 1)[1]
  if not e then return end
  local oldest = now_ms() - tonumber(age)
  if time_of(e) < oldest then
    drop(at_time(oldest), bounded)
    wake()
  end
end

-- a consumer's group as Redis sees it: last delivered id, how many it has read (nil before 7.0)
local function cursor(name)
  if call('EXISTS', S) == 0 then return end
  for _, g in ipairs(call('XINFO', 'GROUPS', S)) do
    local t = {}
    for i = 1, #g, 2 do t[g[i]] = g[i + 1] end
    if t.name == name then return t['last-delivered-id'], t['entries-read'], g end
  end
end

local function set_cursor(name, id, read)
  if read then call('XGROUP', 'SETID', S, name, id, 'ENTRIESREAD', read)
  else call('XGROUP', 'SETID', S, name, id) end
end

-- how many entries a reader at this id has read, where that can be known (own numbers, Redis 7)
local function read_at(id)
  local ms, n = parts(id)
  return ms == '0' and n or nil
end

-- every id of the runs (ms, first, last)*, as text
local function ids_of(runs)
  local out, n = {}, 0
  for i = 1, #runs, 3 do
    local head = text(runs[i]) .. '-'
    for k = runs[i + 1], runs[i + 2] do
      n = n + 1
      out[n] = head .. text(k)
    end
  end
  return out
end

-- a command over many ids, in pieces Lua can unpack; the sum of its answers
local PIECE = 2000
local function each(ids, head, tail)
  local sum = 0
  for at = 1, #ids, PIECE do
    local c = {}
    for i = 1, #head do c[i] = head[i] end
    for i = at, math.min(at + PIECE - 1, #ids) do c[#c + 1] = ids[i] end
    for i = 1, #(tail or {}) do c[#c + 1] = tail[i] end
    local r = call(unpack(c))
    sum = sum + (type(r) == 'table' and #r or r)
  end
  return sum
end

-- settle what lies before the first kept entry: it can neither be delivered nor hold up the others
local function settle_gone(name, first)
  while true do
    local p = call('XPENDING', S, name)
    if p[1] == 0 or (first and not before(p[2], first)) then return p[1], p[2] end
    local ids = {}
    for _, e in ipairs(call('XPENDING', S, name, '-', first and '(' .. first or '+', PIECE)) do ids[#ids + 1] = e[1] end
    if #ids == 0 then return p[1], p[2] end
    each(ids, {'XACK', S, name})
    each(ids, {'ZREM', B .. 'due:' .. name})
  end
end

-- stream and consumer as the caller knows them, or why not
local function known(inc, name, born)
  if (call('HGET', M, 'inc') or '') ~= inc then return {'gone'} end
  if inc == '' and call('EXISTS', S) == 0 then return {'gone'} end
  if name and call('HGET', B .. 'group:' .. name, 'born') ~= born then return {'nobody'} end
end
