-- Read a file that is there. ARGV: id, tenant ('' = any)
-- Answers nil | its fields
local file = file_fields(ARGV[1])
if not file or file.status ~= 'processed' or (ARGV[2] ~= '' and file.tenant ~= ARGV[2]) then return false end
return redis.call('HGETALL', P .. 'file:' .. ARGV[1])
