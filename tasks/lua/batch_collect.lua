-- Read those of some jobs that have ended, up to about max_bytes of answers. ARGV: max_bytes, then job ids
-- Answers {place among the ids from 0, state or 'missing', response, error, usage, outputs}, ...
local answer, size = {}, 0
for i = 2, #ARGV do
  local key = P .. 'job:' .. ARGV[i]
  local state = redis.call('HGET', key, 'state')
  if not state then
    answer[#answer + 1] = {i - 2, 'missing', '', '', '', ''}
  elseif TERMINAL[state] then
    local values = redis.call('HMGET', key, 'response', 'error', 'usage', 'outputs')
    answer[#answer + 1] = {i - 2, state, values[1] or '', values[2] or '', values[3] or '', values[4] or ''}
    size = size + string.len(values[1] or '')
  end
  if size > tonumber(ARGV[1]) then break end
end
return answer
