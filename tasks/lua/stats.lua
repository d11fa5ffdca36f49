-- Count jobs by model. Answers {now ms, {model, waiting, running, created ms of the oldest waiting or ''}, ...}
local answer = {whole(NOW)}
for _, model in ipairs(redis.call('SMEMBERS', P .. 'models')) do
  local oldest = redis.call('ZRANGE', P .. 'ages:' .. model, 0, 0, 'WITHSCORES')
  answer[#answer + 1] = {model, num_waiting(model),
    redis.call('ZCARD', P .. 'running:' .. model), oldest[2] or ''}
end
return answer
