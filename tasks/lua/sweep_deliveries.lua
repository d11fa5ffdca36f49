-- Forget deliveries whose time is over. At most `limit` a call. ARGV: limit
-- Answers {number forgotten, receivers that have something to do now}
local old = redis.call('ZRANGEBYSCORE', P .. 'forget_deliveries', '-inf', whole(NOW), 'LIMIT', 0, ARGV[1])
for _, id in ipairs(old) do forget_delivery(id) end
return {#old, redis.call('ZCOUNT', P .. 'outbox', '-inf', whole(NOW))}
