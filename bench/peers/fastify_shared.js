// Fastify with better-sqlite3 as an expert writes it: all messages of a turn of the event loop share one transaction.
const { timingSafeEqual } = require('node:crypto')
const fastify = require('fastify')()
const Database = require('better-sqlite3')

const db = new Database(process.env.BENCH_DATABASE)
db.pragma('journal_mode = WAL')
db.pragma('synchronous = FULL')
const insert = db.prepare(
  'INSERT INTO messages (received_at, client, body) VALUES (?, ?, ?)')
const insertAll = db.transaction((group, now) => group.map(({ body }) => insertOne(now, body)))
let waiting = []

// The id, or the error if a rule refuses it.
function insertOne (now, body) {
  try {
    return insert.run(now, 'default', body).lastInsertRowid
  } catch (error) {
    if (!error.code.startsWith('SQLITE_CONSTRAINT')) throw error
    error.statusCode = 422
    return error
  }
}

function write () {
  const group = waiting
  waiting = []
  try {
    const ids = insertAll.immediate(group, new Date().toISOString())
    group.forEach(({ resolve, reject }, n) => ids[n] instanceof Error ? reject(ids[n]) : resolve({ id: ids[n] }))
  } catch (error) {
    group.forEach(({ reject }) => reject(error))
  }
}

const secret = Buffer.from('Bearer bench-secret')
fastify.addHook('onRequest', async (request, reply) => {
  const token = Buffer.from(request.headers.authorization ?? '')
  if (token.length !== secret.length || !timingSafeEqual(token, secret)) return reply.code(401).send({ title: 'Unauthorized' })
})

// The body stays as it was sent; JSON.parse only says whether it is JSON.
fastify.addContentTypeParser('application/json', { parseAs: 'string' }, (request, body, done) => {
  try {
    JSON.parse(body)
    done(null, body)
  } catch (error) {
    error.statusCode = 400
    done(error)
  }
})

fastify.post('/messages', (request, reply) => {
  reply.code(201)
  return new Promise((resolve, reject) => {
    if (waiting.push({ body: request.body, resolve, reject }) === 1) setImmediate(write)
  })
})

fastify.listen({ port: Number(process.env.BENCH_PORT), host: '127.0.0.1' })
