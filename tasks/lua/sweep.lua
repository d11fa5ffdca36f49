-- Expire waiting jobs whose time is over, delete ended jobs after result_ttl_ms and dead letters after dead_ttl_ms, say
-- for which models somebody should ring. At most `limit` of each a call. ARGV: limit, result_ttl_ms, dead_ttl_ms
-- Answers {expired ids, number deleted, {model, rings, model, rings, ...}}
local limit = ARGV[1]
local expired = redis.call('ZRANGEBYSCORE', P .. 'deadlines', '-inf', whole(NOW), 'LIMIT', 0, limit)
for _, id in ipairs(expired) do
  local job = load(id)
  local _, code = expiry(job)
  finish(job, 'expired', {error = ERRORS[code]})
end

local old = redis.call('ZRANGEBYSCORE', P .. 'finished', '-inf', whole(NOW - tonumber(ARGV[2])), 'LIMIT', 0, limit)
local dead = redis.call('ZRANGEBYSCORE', P .. 'dead', '-inf', whole(NOW - tonumber(ARGV[3])), 'LIMIT', 0, limit)
for _, id in ipairs(old) do purge(load(id)) end
for _, id in ipairs(dead) do purge(load(id)) end

local ring = {}
for _, model in ipairs(redis.call('SMEMBERS', P .. 'models')) do
  adopt(model)
  local waiting, paused = num_waiting(model), is_paused(model)
  if waiting > 0 and not paused then
    ring[#ring + 1] = model
    ring[#ring + 1] = num_rings(model)
  elseif waiting == 0 and not paused and redis.call('ZCARD', P .. 'running:' .. model) == 0 then
    redis.call('SREM', P .. 'models', model)
  end
end
return {expired, #old + #dead, ring}
