// What every program here prints: one JSON object with the fate of each of its cases.

export async function run(cases, versions = {}) {
  const fates = {};
  for (const [name, one] of Object.entries(cases)) {
    process.stderr.write(`${name}\n`); // the last one is where a program hangs
    try {
      await one();
      fates[name] = "ok";
    } catch (error) {
      fates[name] = String(error.stack ?? error);
    }
  }
  process.stdout.write(JSON.stringify({ cases: fates, ...versions }));
  process.exit(0); // SDKs keep connections open
}
