-- Read a batch. ARGV: id, tenant ('' = any)
-- Answers nil | its fields
if not load_batch(ARGV[1], ARGV[2]) then return false end
return redis.call('HGETALL', P .. 'batch:' .. ARGV[1])
