-- Change a webhook endpoint. Writes endpoint, receiver, outbox. ARGV: id, tenant, name, url, events ('' = as it is),
-- enable ('1' = deliver again, what waits first; '' = as it is, but a new url is enabled too)
-- Answers ok | missing
local key, health = P .. 'endpoint:' .. ARGV[1], P .. 'receiver:' .. ARGV[1]
local seen = redis.call('HMGET', key, 'tenant', 'name', 'url', 'events')
if seen[1] ~= ARGV[2] then return 'missing' end
local moved = ARGV[4] ~= '' and ARGV[4] ~= seen[3]
for i, name in ipairs({'name', 'url', 'events'}) do
  local value = ARGV[i + 2]
  if value ~= '' and value ~= seen[i + 1] then redis.call('HSET', key, name, value, 'updated_ms', whole(NOW)) end
end
if moved or ARGV[6] ~= '' then
  redis.call('DEL', health)
  rescore(ARGV[1])
  redis.call('PUBLISH', P .. 'hooks', '')
end
return 'ok'
