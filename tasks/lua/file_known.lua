-- Which objects in a store outside somebody still needs. ARGV: keys
-- Answers '1' or '' a key: a picture's run holds its job, or the job that ended names it; a part stands on its shelf
local function needed(key)
  local hex, fence = string.match(key, '^out_(%x+)_(%d+)_%d+$')
  if hex then
    local job = load('job_' .. hex)
    if not job then return false end
    if held(job, fence) then return true end
    local outputs = redis.call('HGET', job.key, 'outputs') or ''
    return job.state == 'completed' and string.find(outputs, '"' .. key .. '"', 1, true) ~= nil
  end
  local shelf, n = string.match(key, '^(.+)_%d+_(%d+)$')
  local part = shelf and redis.call('HGET', P .. 'parts:' .. shelf, n)
  return part and cjson.decode(part).key == key
end

local answer = {}
for i, key in ipairs(ARGV) do answer[i] = needed(key) and '1' or '' end
return answer
