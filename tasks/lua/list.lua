-- Scan a tenant's jobs, newest first, for those that match. At most `scan` index entries a call.
-- ARGV: tenant, state ('' = any, dead = dead letters), model, metadata JSON, after (id; '' = start), cursor (seq; '' = none), limit, scan, then fields
-- Answers nil (after is unknown) | {cursor to go on from or '', {id, values}, {id, values}, ...}
local tenant, state, model, limit = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[7])
local wanted = ARGV[4] ~= '' and cjson.decode(ARGV[4]) or {}
local names = {}
for i = 9, #ARGV do names[#names + 1] = ARGV[i] end

local before = ARGV[6]
if before == '' and ARGV[5] ~= '' then
  local job = load_for(ARGV[5], tenant)
  if not job then return false end
  before = job.seq
end

local function matches(key)
  local seen = redis.call('HMGET', key, 'model', 'metadata')
  if model ~= '' and seen[1] ~= model then return false end
  if next(wanted) == nil then return true end
  local metadata = seen[2] and seen[2] ~= '' and cjson.decode(seen[2]) or {}
  for name, value in pairs(wanted) do
    if metadata[name] ~= value then return false end
  end
  return true
end

local index = P .. 'in:' .. state .. ':' .. tenant
if state == '' then index = P .. 'jobs:' .. tenant elseif state == 'dead' then index = P .. 'dead:' .. tenant end
local max = before == '' and '+inf' or '(' .. before
local entries = redis.call('ZREVRANGEBYSCORE', index, max, '-inf', 'WITHSCORES', 'LIMIT', 0, ARGV[8])
local answer = {''}
for i = 1, #entries, 2 do
  local key = P .. 'job:' .. entries[i]
  if matches(key) then answer[#answer + 1] = {entries[i], redis.call('HMGET', key, unpack(names))} end
  if #answer > limit then
    answer[1] = entries[i + 1]
    return answer
  end
end
if #entries == 2 * tonumber(ARGV[8]) then answer[1] = entries[#entries] end
return answer
