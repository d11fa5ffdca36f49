-- Forget a run: its result is where its caller looks. Writes runs, run_due, run_leases.
-- ARGV: task id
-- Answers 'ok'
redis.call('HDEL', P .. 'runs', ARGV[1])
redis.call('ZREM', P .. 'run_due', ARGV[1])
redis.call('ZREM', P .. 'run_leases', ARGV[1])
return 'ok'
