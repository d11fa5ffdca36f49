-- Give an endpoint, or the urls that a tenant's jobs bring along, a new secret. The old one signs too for keep_ms.
-- ARGV: endpoint id ('' = the tenant's own), tenant, secret, keep_ms
-- Answers ok | missing; repeated with the same secret it answers the same
local key = ARGV[1] ~= '' and P .. 'endpoint:' .. ARGV[1] or P .. 'hook_secret:' .. ARGV[2]
if ARGV[1] ~= '' and redis.call('HGET', key, 'tenant') ~= ARGV[2] then return 'missing' end
local old = redis.call('HGET', key, 'secret') or ''
if old == ARGV[3] then return 'ok' end
local keep = tonumber(ARGV[4])
if keep == 0 then old = '' end
redis.call('HSET', key, 'secret', ARGV[3], 'old_secret', old, 'old_until_ms', whole(NOW + keep),
  'updated_ms', whole(NOW))
return 'ok'
