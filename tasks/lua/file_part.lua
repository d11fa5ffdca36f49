-- Add part n to a file that is on its way; repeated, it changes nothing. Writes parts, output:*.
-- ARGV: id, n, key, part JSON, in_ledger ('1' | '')
-- Answers ok | missing (its bytes are not in this Redis) | gone (the file is not on its way)
if redis.call('HGET', P .. 'parts:' .. ARGV[1], ARGV[2]) == ARGV[4] then return 'ok' end
if redis.call('HGET', P .. 'file:' .. ARGV[1], 'status') ~= 'uploading' then return 'gone' end
return shelve(ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5])
