-- All parts are there: show the file, or find the one that an earlier try of the same upload made and drop this one.
-- Writes file, files, expiring, owners, parts, idem.
-- ARGV: id, bytes, seconds to live, idem digest ('' = none), idem ttl ms ('' = as long as the file), look ('1' | ''),
--       body_hash
-- Answers {'ok'} | {'replay', first id, keys of this one's parts...} | {'reuse', keys...} | {'gone'}
local id, idem = ARGV[1], ARGV[4]
local file = file_fields(id)
if not file then return {'gone'} end
if file.status == 'processed' then return {'ok'} end

if idem ~= '' and ARGV[6] ~= '' then
  local first = redis.call('GET', P .. 'idem:' .. idem)
  local before = first and first ~= id and file_fields(first)
  if before and before.status == 'processed' then
    local answer = before.body_hash == ARGV[7] and {'replay', first} or {'reuse'}
    for _, key in ipairs(drop_file(id, file)) do answer[#answer + 1] = key end
    return answer
  end
end

file.bytes, file.body_hash = ARGV[2], ARGV[7]
if idem ~= '' then
  if ARGV[5] ~= '' then
    redis.call('SET', P .. 'idem:' .. idem, id, 'PX', ARGV[5])
  else
    redis.call('SET', P .. 'idem:' .. idem, id)
    file.idem = idem
  end
end
show_file(id, file, ARGV[3])
return {'ok'}
