-- Scan a tenant's deliveries, newest first, for those that match. At most `scan` index entries a call.
-- ARGV: tenant, endpoint, subject, state ('' = any), after (id; '' = start), cursor (number; '' = none), limit, scan,
--       then fields
-- Answers nil (after is unknown) | {cursor to go on from or '', {id, values}, {id, values}, ...}
local wanted = {endpoint = ARGV[2], subject = ARGV[3], state = ARGV[4]}
local limit = tonumber(ARGV[7])
local names = {unpack(ARGV, 9)}
local index = P .. 'deliveries:' .. ARGV[1]

local before = ARGV[6]
if before == '' and ARGV[5] ~= '' then
  before = redis.call('ZSCORE', index, ARGV[5])
  if not before then return false end
end

local function matches(key)
  for name, value in pairs(wanted) do
    if value ~= '' and redis.call('HGET', key, name) ~= value then return false end
  end
  return true
end

local max = before == '' and '+inf' or '(' .. before
local entries = redis.call('ZREVRANGEBYSCORE', index, max, '-inf', 'WITHSCORES', 'LIMIT', 0, ARGV[8])
local answer = {''}
for i = 1, #entries, 2 do
  local key = P .. 'delivery:' .. entries[i]
  if matches(key) then
    local due = redis.call('ZSCORE', P .. 'queue:' .. redis.call('HGET', key, 'receiver'), entries[i])
    answer[#answer + 1] = {entries[i], redis.call('HMGET', key, unpack(names)), due or ''}
  end
  if #answer > limit then
    answer[1] = entries[i + 1]
    return answer
  end
end
if #entries == 2 * tonumber(ARGV[8]) then answer[1] = entries[#entries] end
return answer
