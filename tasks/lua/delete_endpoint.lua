-- Delete a webhook endpoint; what waits for it fails. Writes endpoint, endpoints, receiver, outbox, gone.
-- ARGV: id, tenant, token. Answers deleted | missing; repeated with the same token it answers the same
local gone = P .. 'gone:' .. ARGV[1]
if redis.call('GET', gone) == ARGV[3] then return 'deleted' end
if redis.call('HGET', P .. 'endpoint:' .. ARGV[1], 'tenant') ~= ARGV[2] then return 'missing' end
redis.call('DEL', P .. 'endpoint:' .. ARGV[1], P .. 'receiver:' .. ARGV[1])
redis.call('ZREM', P .. 'endpoints:' .. ARGV[2], ARGV[1])
redis.call('SET', gone, ARGV[3], 'PX', 60000)
rescore(ARGV[1])
return 'deleted'
