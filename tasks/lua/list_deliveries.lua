-- Scan a tenant's deliveries, newest first, for those that match. At most `scan` index entries a call.
-- ARGV: tenant, endpoint, subject, state ('' = any), after (id; '' = start), cursor (number; '' = none), limit, scan,
--       then fields
-- Answers nil (after is unknown) | {cursor to go on from or '', {id, values}, {id, values}, ...}
local wanted = {endpoint = ARGV[2], subject = ARGV[3], state = ARGV[4]}
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
return page_of(entries, tonumber(ARGV[7]), tonumber(ARGV[8]), function(id)
  local key = P .. 'delivery:' .. id
  if not matches(key) then return nil end
  local due = redis.call('ZSCORE', P .. 'queue:' .. redis.call('HGET', key, 'receiver'), id)
  return {id, redis.call('HMGET', key, unpack(names)), due or ''}
end)
