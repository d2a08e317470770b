// Weights in the browser's own storage: fetched once, resumed where they broke off, believed only with the right hash.

const READ = 1 << 22; // bytes hashed at once

/** The file with this hash as a File, from storage, or else from `url`. */
export async function stored(url, { bytes, sha256 }, onProgress) {
  if (!navigator.storage?.getDirectory) {
    throw new Error("the browser gives this page no storage: it must be new, and the page under https:// or on localhost");
  }
  const root = await navigator.storage.getDirectory();
  const folder = await root.getDirectoryHandle("gemma-edge", { create: true });
  const whole = await folder.getFileHandle(sha256).catch(() => null);
  if (whole) return whole.getFile();
  const part = await folder.getFileHandle(`${sha256}.part`, { create: true });
  await download(url, part, bytes, onProgress);
  if ((await hash(await part.getFile(), onProgress)) !== sha256) {
    await folder.removeEntry(part.name);
    throw new Error(`${url} is not the file that the manifest names; export the bundle again, and load the page again`);
  }
  await part.move(sha256);
  return part.getFile();
}

async function download(url, handle, bytes, onProgress) {
  const file = await handle.createSyncAccessHandle().catch(() => {
    throw new Error("another tab is loading this model; wait for it, or close it, and load the page again");
  });
  try {
    let done = file.getSize();
    if (done >= bytes) return;
    await roomFor(bytes - done);
    const response = await fetch(url, done ? { headers: { Range: `bytes=${done}-` } } : {});
    if (!response.ok) throw new Error(`${url}: the server answered ${response.status}`);
    if (response.status !== 206) file.truncate((done = 0)); // it sends the whole file
    for await (const piece of pieces(response.body)) {
      if (done + piece.length > bytes) throw new Error(`${url} has more than the ${bytes} bytes of the manifest`);
      file.write(piece, { at: done });
      done += piece.length;
      onProgress({ stage: "download", done, total: bytes });
    }
    if (done < bytes) throw new Error(`${url} broke off at ${done} of ${bytes} bytes; load the page again to go on there`);
  } catch (error) {
    if (error.name === "QuotaExceededError") await roomFor(Infinity);
    if (error instanceof TypeError) throw new Error(`${url} broke off; load the page again to go on there`); // fetch's own
    throw error;
  } finally {
    file.flush();
    file.close();
  }
}

async function* pieces(stream) {
  const reader = stream.getReader();
  for (let next; !(next = await reader.read()).done; ) yield next.value;
}

async function roomFor(bytes) {
  const { quota = 0, usage = 0 } = await navigator.storage.estimate();
  if (bytes <= quota - usage) return;
  const mb = (n) => `${Math.round(n / 1e6)} MB`;
  throw new Error(`the browser gives this page ${mb(quota - usage)} of storage, which is too little for the model; free some space`);
}

async function hash(file, onProgress) {
  const sha256 = await self.hashwasm.createSHA256();
  for (let done = 0; done < file.size; done += READ) {
    sha256.update(new Uint8Array(await file.slice(done, done + READ).arrayBuffer()));
    onProgress({ stage: "check", done: Math.min(file.size, done + READ), total: file.size });
  }
  return sha256.digest();
}
