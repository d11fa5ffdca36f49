-- Make a webhook endpoint. ARGV: id, tenant, name, url, events, secret, max endpoints of a tenant
-- Answers made | full; repeated with the same id it answers the same
local key, index = P .. 'endpoint:' .. ARGV[1], P .. 'endpoints:' .. ARGV[2]
if redis.call('EXISTS', key) == 1 then return 'made' end
if redis.call('ZCARD', index) >= tonumber(ARGV[7]) then return 'full' end
redis.call('HSET', key, 'tenant', ARGV[2], 'name', ARGV[3], 'url', ARGV[4], 'events', ARGV[5], 'secret', ARGV[6],
  'created_ms', whole(NOW), 'updated_ms', whole(NOW))
redis.call('ZADD', index, whole(NOW), ARGV[1])
return 'made'
