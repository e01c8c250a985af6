// OpenTelemetry's exporter (OTLP over HTTP, as JSON) sends a batch of records as one message. It tries again for about ten
// seconds, then the batch is lost without a word; it has no key, so a batch whose answer was lost comes twice.
// npm install @opentelemetry/exporter-logs-otlp-http @opentelemetry/sdk-logs @opentelemetry/api
import { LoggerProvider, BatchLogRecordProcessor } from '@opentelemetry/sdk-logs';
import { OTLPLogExporter } from '@opentelemetry/exporter-logs-otlp-http';

const exporter = new OTLPLogExporter({
  url: process.env.INLET_URL,
  headers: { Authorization: `Bearer ${process.env.INLET_TOKEN}` },
  timeoutMillis: 30000, // the default of 10000 gives up after 8 s
});
const provider = new LoggerProvider({ processors: [new BatchLogRecordProcessor({ exporter, maxExportBatchSize: 1 })] });
const logger = provider.getLogger('example');
for (let n = 0; n < Number(process.argv[2]); n++) logger.emit({ body: `event ${n}`, attributes: { n } });
await provider.shutdown();
