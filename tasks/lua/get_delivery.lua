-- Read one delivery. ARGV: id, tenant, then fields. Answers nil | {id, values, ms at which it is due or ''}
local key = P .. 'delivery:' .. ARGV[1]
local seen = redis.call('HMGET', key, 'tenant', 'receiver')
if seen[1] ~= ARGV[2] then return false end
local due = redis.call('ZSCORE', P .. 'queue:' .. seen[2], ARGV[1])
return {ARGV[1], redis.call('HMGET', key, unpack(ARGV, 3)), due or ''}
