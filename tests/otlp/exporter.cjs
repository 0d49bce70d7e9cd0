// The spans of test_exporters.py, sent by the unmodified exporter of OpenTelemetry JS: node exporter.cjs URL
const { SpanKind, SpanStatusCode, context, trace } = require('@opentelemetry/api');
const { OTLPTraceExporter } = require('@opentelemetry/exporter-trace-otlp-http');
const { resourceFromAttributes } = require('@opentelemetry/resources');
const { BatchSpanProcessor, NodeTracerProvider } = require('@opentelemetry/sdk-trace-node');

async function main() {
  const exporter = new OTLPTraceExporter({ url: process.argv[2] });
  const provider = new NodeTracerProvider({
    resource: resourceFromAttributes({ 'service.name': 'chat-api', 'deployment.zones': ['a', 'b'] }),
    spanProcessors: [new BatchSpanProcessor(exporter)],
  });
  provider.register();
  const tracer = provider.getTracer('test.instrumentation', '1.2');
  const agent = tracer.startSpan('invoke_agent helper', { attributes: { 'gen_ai.operation.name': 'invoke_agent' } });
  const inside = trace.setSpan(context.active(), agent);
  const good = tracer.startSpan('chat gpt-4', {
    kind: SpanKind.CLIENT,
    attributes: {
      'gen_ai.operation.name': 'chat', 'gen_ai.provider.name': 'openai', 'gen_ai.request.model': 'gpt-4',
      'gen_ai.request.temperature': 0.5, 'gen_ai.response.model': 'gpt-4-0613', 'gen_ai.usage.input_tokens': 374,
      'gen_ai.usage.output_tokens': 44, 'gen_ai.usage.cost': 0.01386, 'gen_ai.response.finish_reasons': ['stop'],
    },
  }, inside);
  good.addEvent('gen_ai.choice', { index: 0 });
  good.end();
  const failed = tracer.startSpan('chat gpt-4', { kind: SpanKind.CLIENT }, inside);
  failed.recordException(new TypeError('no answer'));
  failed.setStatus({ code: SpanStatusCode.ERROR, message: 'TypeError: no answer' });
  failed.end();
  agent.end();
  await provider.shutdown();
}

main().catch((error) => { console.error(error); process.exit(1); });
