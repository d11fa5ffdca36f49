-- The tail lies in the store as part n: put the part on the shelf and empty the tail. Writes batch, tail, parts, output:*.
-- ARGV: id, fence, n, key, part JSON, bytes of the tail, in_ledger ('1' | '')
-- Answers stale | same | missing | ok
local batch = run_batch(ARGV[1], ARGV[2])
if not batch then return 'stale' end
if tonumber(batch.parts) < tonumber(ARGV[3]) then return 'stale' end  -- as in batch_commit
if batch.parts ~= ARGV[3] then return 'same' end
local tail = P .. 'tail:' .. batch.id
if redis.call('STRLEN', tail) ~= tonumber(ARGV[6]) then return 'stale' end
local word = shelve(batch.id, ARGV[3], ARGV[4], ARGV[5], ARGV[7])
if word ~= 'ok' then return word end
redis.call('DEL', tail)
redis.call('HSET', batch.key, 'parts', whole(tonumber(ARGV[3]) + 1))
return 'ok'
