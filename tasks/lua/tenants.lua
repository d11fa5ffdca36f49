-- Replace what is known of tenants' weights and quotas. Writes tenants. ARGV: tenant, JSON, tenant, JSON, ...
-- Answers how many there are
redis.call('DEL', P .. 'tenants')
for i = 1, #ARGV, 2 do redis.call('HSET', P .. 'tenants', ARGV[i], ARGV[i + 1]) end
return #ARGV / 2
