-- What a batch has written so far, read in one moment. ARGV: id, tenant ('' = any)
-- Answers nil | {fields, parts, tail}
if not load_batch(ARGV[1], ARGV[2]) then return false end
return {redis.call('HGETALL', P .. 'batch:' .. ARGV[1]), redis.call('HGETALL', P .. 'parts:' .. ARGV[1]),
  redis.call('GET', P .. 'tail:' .. ARGV[1]) or ''}
