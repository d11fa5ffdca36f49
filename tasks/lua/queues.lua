-- What waits and runs, by model. ARGV: model ('' = all), tenant whose jobs are counted apart ('' = every tenant's)
-- Answers {now ms, {model, waiting, running, created ms of the oldest waiting or '', paused ms or '', gap ms or '',
--   {tenant, waiting, tenant, waiting, ...}}, ...}; at most a hundred tenants of one class are counted apart
local models = ARGV[1] ~= '' and {ARGV[1]} or redis.call('SMEMBERS', P .. 'models')

local function by_tenant(model)
  local counts, answer = {}, {}
  for _, class in ipairs(redis.call('ZRANGE', P .. 'classes:' .. model, 0, -1)) do
    local q = model .. '\n' .. class
    local tenants = ARGV[2] ~= '' and {ARGV[2]} or redis.call('ZRANGE', P .. 'turns:' .. q, 0, 99)
    for _, tenant in ipairs(tenants) do
      counts[tenant] = (counts[tenant] or 0) + redis.call('ZCARD', P .. 'waiting:' .. q .. '\n' .. tenant)
    end
  end
  for tenant, waiting in pairs(counts) do
    answer[#answer + 1] = tenant
    answer[#answer + 1] = waiting
  end
  return answer
end

local answer = {whole(NOW)}
for _, model in ipairs(models) do
  local oldest = redis.call('ZRANGE', P .. 'ages:' .. model, 0, 0, 'WITHSCORES')
  local gap = gap_of(model)
  answer[#answer + 1] = {model, num_waiting(model), redis.call('ZCARD', P .. 'running:' .. model), oldest[2] or '',
    redis.call('HGET', P .. 'order:' .. model, 'paused_ms') or '', gap and whole(gap) or '', by_tenant(model)}
end
return answer
