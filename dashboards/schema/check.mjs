// Holds each generated dashboard against the types that Grafana publishes (npm package @grafana/schema, Apache-2.0).
//
// Every dashboard becomes a TypeScript literal of type Dashboard, and every panel's options and field configuration literals
// of its kind's types; the compiler then finds what is missing, misspelt, too much or of the wrong type. Run it with
// `npm install && npm run check` here after the model in dashboards/src/grafana has changed: it needs the network once.
import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const here = dirname(fileURLToPath(import.meta.url));
const dashboards = join(here, '../export/grafana/dashboards');

// Where the types of each kind of panel are: [module, options, field configuration].
const module = (folder, name) => `@grafana/schema/dist/esm/raw/composable/${folder}/panelcfg/x/${name}PanelCfg_types.gen`;
const kinds = {
  stat: [module('stat', 'Stat'), 'Options', undefined],
  timeseries: [module('timeseries', 'TimeSeries'), 'Options', 'FieldConfig'],
  heatmap: [module('heatmap', 'Heatmap'), 'Options', 'FieldConfig'],
  'state-timeline': [module('statetimeline', 'StateTimeline'), 'Options', 'FieldConfig'],
  table: [module('table', 'Table'), 'Options', 'FieldConfig'],
};

const lines = [
  "import type { Dashboard } from '@grafana/schema';",
  ...Object.entries(kinds).map(([kind, [from]]) => `import type * as ${kind.replace('-', '')} from '${from}';`),
  '// JSON has the values of enumerations, not their names.',
  'type Json<T> = T extends string ? `${T}` : T extends number ? number : T extends boolean | null | undefined ? T',
  '  : T extends (infer E)[] ? Json<E>[] : T extends object ? { [K in keyof T]: Json<T[K]> } : T;',
];
// What the Prometheus data source reads of an annotation, which the general types leave to it.
const pluginFields = ['titleFormat', 'textFormat', 'tagKeys', 'useValueForTime'];
let panels = 0;
for (const file of readdirSync(dashboards).filter((name) => name.endsWith('.json')).sort()) {
  const board = JSON.parse(readFileSync(join(dashboards, file), 'utf8'));
  for (const mark of board.annotations.list) {
    pluginFields.forEach((field) => delete mark[field]);
    ['expr', 'interval'].forEach((field) => delete mark.target[field]);
  }
  lines.push(`// ${file}`, `export const b${lines.length}: Json<Dashboard> = ${JSON.stringify(board)};`);
  for (const panel of board.panels.filter((panel) => panel.type !== 'row')) {
    const [, options, fields] = kinds[panel.type] ?? [];
    if (!options) throw new Error(`${file}: no types are known for ${panel.type}`);
    const of = panel.type.replace('-', '');
    lines.push(`// ${file}: ${panel.title}`);
    lines.push(`export const o${lines.length}: Json<${of}.${options}> = ${JSON.stringify(panel.options)};`);
    if (fields) {
      const custom = JSON.stringify(panel.fieldConfig.defaults.custom);
      lines.push(`export const f${lines.length}: Json<${of}.${fields}> = ${custom};`);
    }
    panels += 1;
  }
}

const work = join(here, 'node_modules/.check');
mkdirSync(work, { recursive: true });
writeFileSync(join(work, 'check.ts'), lines.join('\n') + '\n');
const compiler = join(here, 'node_modules/typescript/bin/tsc');
const flags = ['--noEmit', '--strict', '--skipLibCheck', '--module', 'nodenext', '--moduleResolution', 'nodenext'];
try {
  execFileSync(process.execPath, [compiler, ...flags, join(work, 'check.ts')], { stdio: 'inherit' });
} catch {
  console.error('the dashboards are not what the types say; see the lines of node_modules/.check/check.ts');
  process.exit(1);
}
console.log(`${panels} panels are what Grafana's types say`);
