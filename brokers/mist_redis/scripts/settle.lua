-- ARGV: inc, name, born, what (ack, nak, unseen, term, extend, dead), msgpack {attempts_max,
-- delay in ms, {seeks, moved, times, how many} …}, then the ids of each, in order
local gone = known(ARGV[1], ARGV[2], ARGV[3])
if gone then return gone end
local name, what = ARGV[2], ARGV[4]
local G, D = B .. 'group:' .. name, B .. 'due:' .. name
local p = cmsgpack.unpack(ARGV[5])
local g = call('HMGET', G, 'seeks', 'moved', 'most')
local owner = what == 'dead' and 'mist:dead' or 'mist'
if call('EXISTS', S) == 0 then return {'ok', {}, {}} end

-- those of these ids that are held under this attempt, as the pending list says; the ids come in order
local function held(from, to, times)
  local out, asked = {}, {}
  for i = from, to do asked[ARGV[i]] = true end
  local function add(es)
    for _, e in ipairs(es) do
      if asked[e[1]] and e[2] == owner and e[4] == times then out[#out + 1] = e[1] end
    end
  end
  if to - from < 8 then
    for i = from, to do add(call('XPENDING', S, name, ARGV[i], ARGV[i], 1)) end
    return out
  end
  local low = ARGV[from]
  while true do
    local es = call('XPENDING', S, name, low, ARGV[to], PIECE)
    add(es)
    if #es < PIECE then return out end
    low = '(' .. es[#es][1]
  end
end

local before_ = call('XPENDING', S, name)[1]
local counts, dead, back, settled, to = {}, {}, {}, 0, 5
for i = 3, #p do
  local seeks, moved, times, n = p[i][1], p[i][2], p[i][3], 0
  local from = to + 1
  to = to + p[i][4]
  if seeks == g[1] then
    if what == 'ack' and moved == g[2] then
      -- no lease has changed hands since they were given: what is pending among them is theirs
      for at = from, to, PIECE do
        n = n + call('XACK', S, name, unpack(ARGV, at, math.min(at + PIECE - 1, to)))
      end
    else
      local ids = held(from, to, times)
      if #ids > 0 then
        if what == 'ack' or what == 'dead' then
          n = n + each(ids, {'XACK', S, name})
        elseif what == 'extend' then
          n = n + each(ids, {'XCLAIM', S, name, 'mist', 0}, {'JUSTID'})
        else
          n = n + #ids
          local die = what == 'term' or (p[1] > 0 and times >= p[1])
          die = die and what ~= 'unseen'
          local into = die and dead or back
          each(ids, {'XCLAIM', S, name, die and 'mist:dead' or 'mist:back', 0},
            what == 'unseen' and {'RETRYCOUNT', times - 1, 'JUSTID'} or {'JUSTID'})
          for _, id in ipairs(ids) do into[#into + 1] = id end
        end
      end
    end
  end
  counts[i - 2] = n
  settled = settled + n
end
if #back > 0 then
  local due = text(now_ms() + p[2])
  for _, id in ipairs(back) do call('ZADD', D, due, id) end
end
if #back > 0 or #dead > 0 then
  call('HINCRBY', G, 'moved', 1)
  wake()
elseif settled > 0 and (what == 'ack' or what == 'dead') and before_ >= tonumber(g[3]) then
  wake()
end
return {'ok', counts, dead}
