-- Shared by the scripts of files and batches; stands behind records.lua. A shelf is a row of parts in the store; a file
-- is what one owner of a shelf sees of it (see kind).
--   file:<id>            hash  tenant, filename, purpose, status (uploading | processed), bytes, created_ms, expires_ms,
--                              seq, shelf, kind ('' = all of it, output, error), idem, body_hash
--   files:<tenant>       zset  id -> seq, the processed ones
--   expiring             zset  file id -> ms at which it is forgotten
--   parts:<shelf>        hash  n -> JSON of part n: key, size, sha256, lines
--   owners:<shelf>       set   files and batches that need it; without one it is dropped
--   users:<file>         set   batches that have not ended and read it

-- Keep one part, in the place of what an earlier run may have put there. A file in this Redis was written to die by
-- itself, and lives on from here.
local function shelve(shelf, n, key, part, in_ledger)
  local before = redis.call('HGET', P .. 'parts:' .. shelf, n)
  if before and cjson.decode(before).key ~= key then drop_files({cjson.decode(before).key}) end
  if in_ledger ~= '' then
    if redis.call('EXISTS', P .. 'output:' .. key) == 0 then return 'missing' end
    redis.call('PERSIST', P .. 'output:' .. key)
  end
  redis.call('HSET', P .. 'parts:' .. shelf, n, part)
  return 'ok'
end

-- Take an owner off a shelf. Answers the keys of its parts once nobody is left; those in this Redis are gone then.
local function disown(shelf, owner)
  local keys = {}
  redis.call('SREM', P .. 'owners:' .. shelf, owner)
  if redis.call('SCARD', P .. 'owners:' .. shelf) > 0 then return keys end
  for _, part in ipairs(redis.call('HVALS', P .. 'parts:' .. shelf)) do keys[#keys + 1] = cjson.decode(part).key end
  drop_files(keys)
  redis.call('UNLINK', P .. 'parts:' .. shelf)
  return keys
end

local function file_fields(id)
  local file = {}
  local flat = redis.call('HGETALL', P .. 'file:' .. id)
  for i = 1, #flat, 2 do file[flat[i]] = flat[i + 1] end
  return file.tenant and file or nil
end

-- Forget a file. Answers what disown does.
local function drop_file(id, file)
  redis.call('ZREM', P .. 'files:' .. file.tenant, id)
  redis.call('ZREM', P .. 'expiring', id)
  if file.idem ~= '' then redis.call('DEL', P .. 'idem:' .. file.idem) end
  redis.call('UNLINK', P .. 'file:' .. id, P .. 'users:' .. id)
  return disown(file.shelf, id)
end

-- Begin a file that is on its way; without an end it is forgotten after ttl_ms.
local function open_file(id, tenant, filename, purpose, ttl_ms)
  if redis.call('EXISTS', P .. 'file:' .. id) == 1 then return end
  redis.call('HSET', P .. 'file:' .. id, 'tenant', tenant, 'filename', filename, 'purpose', purpose,
    'status', 'uploading', 'bytes', '0', 'created_ms', whole(NOW), 'expires_ms', whole(NOW + tonumber(ttl_ms)),
    'shelf', id, 'kind', '', 'idem', '', 'body_hash', '')
  redis.call('ZADD', P .. 'expiring', whole(NOW + tonumber(ttl_ms)), id)
  redis.call('SADD', P .. 'owners:' .. id, id)
end

-- Show a file to its tenant for so many seconds.
local function show_file(id, file, seconds)
  file.seq = whole(redis.call('INCR', P .. 'seq'))
  file.status, file.created_ms, file.expires_ms = 'processed', whole(NOW), whole(NOW + 1000 * tonumber(seconds))
  local flat = {}
  for name, value in pairs(file) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
  end
  redis.call('HSET', P .. 'file:' .. id, unpack(flat))
  redis.call('ZADD', P .. 'files:' .. file.tenant, file.seq, id)
  redis.call('ZADD', P .. 'expiring', file.expires_ms, id)
  redis.call('SADD', P .. 'owners:' .. file.shelf, id)
end
