-- A tenant's files. At most `scan` index entries a call.
-- ARGV: tenant, purpose ('' = any), after (id; '' = start), cursor (seq; '' = none), limit, scan, order (asc | desc)
-- Answers nil (after is unknown) | {cursor to go on from or '', {id, fields}, ...}
local index, from = P .. 'files:' .. ARGV[1], ARGV[4]
if from == '' and ARGV[3] ~= '' then
  from = redis.call('ZSCORE', index, ARGV[3])
  if not from then return false end
end
local bound = from == '' and (ARGV[7] == 'asc' and '-inf' or '+inf') or '(' .. from
local entries
if ARGV[7] == 'asc' then
  entries = redis.call('ZRANGEBYSCORE', index, bound, '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[6])
else
  entries = redis.call('ZREVRANGEBYSCORE', index, bound, '-inf', 'WITHSCORES', 'LIMIT', 0, ARGV[6])
end
return page_of(entries, tonumber(ARGV[5]), tonumber(ARGV[6]), function(id)
  local key = P .. 'file:' .. id
  local matches = ARGV[2] == '' or redis.call('HGET', key, 'purpose') == ARGV[2]
  return matches and {id, redis.call('HGETALL', key)} or nil
end)
