// Fastify with better-sqlite3, prepared once, as both of their documentations have it.
const fastify = require('fastify')()
const Database = require('better-sqlite3')

const options = process.env.BENCH_SQL_LOG
  ? { verbose: () => { count += 1 } }
  : {}
let count = 0
const db = new Database(process.env.BENCH_DATABASE, options)
db.pragma('journal_mode = WAL')
db.pragma('synchronous = FULL')
const insert = db.prepare(
  'INSERT INTO messages (received_at, client, body) VALUES (?, ?, ?)')

fastify.post('/messages', (request, reply) => {
  const result = insert.run(new Date().toISOString(), 'default', JSON.stringify(request.body))
  reply.code(201).send({ id: result.lastInsertRowid })
})

if (process.env.BENCH_SQL_LOG) {
  setInterval(() => {
    require('fs').writeFileSync(process.env.BENCH_SQL_LOG + '.new', JSON.stringify({ statements: count }))
    require('fs').renameSync(process.env.BENCH_SQL_LOG + '.new', process.env.BENCH_SQL_LOG)
  }, 100)
}

fastify.listen({ port: Number(process.env.BENCH_PORT), host: '127.0.0.1' })
