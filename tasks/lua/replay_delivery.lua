-- Send a delivery once more, now, with its whole schedule before it. Writes delivery, queue, outbox, receiver.
-- ARGV: id, tenant, token
-- Answers replayed | missing | deleted (its endpoint) | disabled (its endpoint); with the same token the same
local key = P .. 'delivery:' .. ARGV[1]
local seen = redis.call('HMGET', key, 'tenant', 'receiver', 'endpoint', 'replay_token')
if seen[1] ~= ARGV[2] then return 'missing' end
if seen[4] == ARGV[3] then return 'replayed' end
local receiver = seen[2]
if seen[3] ~= '' and redis.call('EXISTS', P .. 'endpoint:' .. seen[3]) == 0 then return 'deleted' end
if seen[3] == '' then
  redis.call('DEL', P .. 'receiver:' .. receiver)
elseif (redis.call('HGET', P .. 'receiver:' .. receiver, 'disabled') or '') ~= '' then
  return 'disabled'
end
redis.call('HSET', key, 'replay_token', ARGV[3], 'state', 'pending', 'attempts', '0', 'ended_ms', '')
redis.call('ZADD', P .. 'forget_deliveries', whole(NOW + HOOK_KEEP_MS), ARGV[1])
-- One that is on its way just now is not sent a second time beside itself.
if not redis.call('ZSCORE', P .. 'sending:' .. receiver, ARGV[1]) then queue_delivery(ARGV[1], receiver, NOW) end
return 'replayed'
