-- Scan a tenant's jobs, newest first, for those that match. At most `scan` index entries a call.
-- ARGV: tenant, state ('' = any, dead = dead letters), model, metadata JSON, after (id; '' = start), cursor (seq; '' = none), limit, scan, then fields
-- Answers nil (after is unknown) | {cursor to go on from or '', {id, values}, {id, values}, ...}
local tenant, state, model = ARGV[1], ARGV[2], ARGV[3]
local wanted = ARGV[4] ~= '' and cjson.decode(ARGV[4]) or {}
local names = {unpack(ARGV, 9)}

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
return page_of(entries, tonumber(ARGV[7]), tonumber(ARGV[8]), function(id)
  local key = P .. 'job:' .. id
  return matches(key) and {id, redis.call('HMGET', key, unpack(names))} or nil
end)
