-- Begin a file that is on its way; without an end it is forgotten after ttl_ms. Writes file, expiring, owners.
-- ARGV: id, tenant, filename, purpose, ttl_ms
-- Answers ok
local id = ARGV[1]
if redis.call('EXISTS', P .. 'file:' .. id) == 0 then
  redis.call('HSET', P .. 'file:' .. id, 'tenant', ARGV[2], 'filename', ARGV[3], 'purpose', ARGV[4],
    'status', 'uploading', 'bytes', '0', 'created_ms', whole(NOW), 'expires_ms', whole(NOW + tonumber(ARGV[5])),
    'shelf', id, 'kind', '', 'idem', '', 'body_hash', '')
  redis.call('ZADD', P .. 'expiring', whole(NOW + tonumber(ARGV[5])), id)
  redis.call('SADD', P .. 'owners:' .. id, id)
end
return 'ok'
