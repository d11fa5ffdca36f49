-- Forget a file, or give up one that is on its way. Writes what drop_file writes, and gone so that a repeated call
-- answers the same. ARGV: id, tenant ('' = any), token, status that it must have
-- Answers {'deleted', keys of the parts that nobody needs any more...} | {'missing'} | {'busy'} (a batch reads it)
local gone = P .. 'gone:' .. ARGV[1]
if redis.call('GET', gone) == ARGV[3] then return {'deleted'} end
local file = file_fields(ARGV[1])
if not file or file.status ~= ARGV[4] or (ARGV[2] ~= '' and file.tenant ~= ARGV[2]) then return {'missing'} end
if redis.call('SCARD', P .. 'users:' .. ARGV[1]) > 0 then return {'busy'} end
redis.call('SET', gone, ARGV[3], 'PX', 60000)
return {'deleted', unpack(drop_file(ARGV[1], file))}
