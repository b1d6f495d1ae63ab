//! A real S3 engine on loopback, and a proxy before it that counts, delays and breaks requests.
//!
//! The engine is Garage, of a single node. `cargo xtask test` builds it where it is missing; its files
//! lie in the test's own directory, its log too, which is shown when a test fails.

use crate::support::{Done, Kept, Place, finished, until};
use object_store::aws::AmazonS3Builder;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

const ID: &str = "GK0123456789abcdef01234567";
const SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const BUCKET: &str = "shelves";

/// The engine's program; where it is not there the test says that it was skipped.
pub fn may_run(name: &str) -> bool {
    let there = program().is_file();
    if !there {
        println!("SKIPPED 1 test: {name}: Garage is not built");
        println!("skipped: Garage is not built: `cargo xtask lab objects` builds it");
    }
    there && crate::support::may_run(name)
}

fn program() -> PathBuf {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let built = |cache: PathBuf| cache.join("outlive/garage-2.5.0/bin/garage");
    let given = variable("OUTLIVE_GARAGE");
    given.or_else(|| cache.map(built)).unwrap_or_default()
}

/// A running engine.
pub struct Garage<'a> {
    place: &'a Place,
    port: u16,
    engine: Mutex<Option<Kept>>,
}

/// A port that nobody has just now.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

impl<'a> Garage<'a> {
    pub fn start(place: &'a Place) -> Self {
        let (port, rpc) = (free_port(), free_port());
        let dir = place.text("garage");
        fs::create_dir(&dir).unwrap();
        let config = format!(
            "metadata_dir = \"{dir}/meta\"\ndata_dir = \"{dir}/data\"\ndb_engine = \"lmdb\"\n\
             replication_factor = 1\nrpc_bind_addr = \"127.0.0.1:{rpc}\"\n\
             rpc_public_addr = \"127.0.0.1:{rpc}\"\nrpc_secret = \"{SECRET}\"\n\
             [s3_api]\ns3_region = \"garage\"\napi_bind_addr = \"127.0.0.1:{port}\"\n"
        );
        fs::write(place.path("garage/config.toml"), config).unwrap();
        let garage = Self {
            place,
            port,
            engine: Mutex::new(None),
        };
        garage.again();
        garage
    }

    /// Starts it, with what it had.
    pub fn again(&self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.place.path("garage/log"))
            .unwrap();
        let mut command = Command::new(program());
        command
            .args(["--config", &self.place.text("garage/config.toml")])
            .args(["server", "--single-node", "--default-bucket"])
            .env("GARAGE_DEFAULT_ACCESS_KEY", ID)
            .env("GARAGE_DEFAULT_SECRET_KEY", SECRET)
            .env("GARAGE_DEFAULT_BUCKET", BUCKET)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let keeper = std::os::unix::process::CommandExt::process_group(&mut command, 0)
            .spawn()
            .unwrap();
        *self.engine.lock().unwrap() = Some(Kept {
            keeper,
            output: None,
        });
        let bucket = self.bucket();
        until("the engine answers", || bucket.names().is_some());
    }

    /// Its power is cut.
    pub fn kill(&self) {
        drop(self.engine.lock().unwrap().take());
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// What is in the bucket, past Outlive.
    pub fn bucket(&self) -> Bucket {
        // Building any client needs it, also one that speaks without TLS.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = AmazonS3Builder::new()
            .with_endpoint(format!("http://127.0.0.1:{}", self.port))
            .with_allow_http(true)
            .with_region("garage")
            .with_bucket_name(BUCKET)
            .with_access_key_id(ID)
            .with_secret_access_key(SECRET)
            .with_retry(object_store::RetryConfig {
                max_retries: 0,
                ..Default::default()
            });
        Bucket {
            store: Box::new(store.build().unwrap()),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
        }
    }
}

impl Drop for Garage<'_> {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            let log = fs::read(self.place.path("garage/log")).unwrap_or_default();
            println!("the engine's log:\n{}", String::from_utf8_lossy(&log));
        }
    }
}

/// What the engine holds, as another client sees it.
pub struct Bucket {
    store: Box<dyn ObjectStore>,
    runtime: tokio::runtime::Runtime,
}

impl Bucket {
    /// The names of all objects; `None` where the engine does not answer.
    pub fn names(&self) -> Option<Vec<String>> {
        use futures_util::TryStreamExt;
        let all = self.store.list(None).try_collect::<Vec<_>>();
        let all = self.runtime.block_on(all).ok()?;
        let mut names: Vec<String> = all
            .iter()
            .map(|object| object.location.to_string())
            .collect();
        names.sort();
        Some(names)
    }

    /// The names of the objects that have this in theirs.
    pub fn with(&self, part: &str) -> Vec<String> {
        let mut names = self.names().unwrap();
        names.retain(|name| name.contains(part));
        names
    }

    pub fn get(&self, name: &str) -> Vec<u8> {
        let got = async { self.store.get(&Key::from(name)).await?.bytes().await };
        self.runtime.block_on(got).unwrap().to_vec()
    }

    pub fn put(&self, name: &str, bytes: &[u8]) {
        let key = Key::from(name);
        let put = self.store.put(&key, bytes.to_vec().into());
        self.runtime.block_on(put).unwrap();
    }

    pub fn remove(&self, name: &str) {
        self.runtime
            .block_on(self.store.delete(&Key::from(name)))
            .unwrap();
    }
}

/// Hears the method and the path of each request before the engine does, and may wait; where it
/// says no, the connection is cut.
type Rule = Arc<dyn Fn(&str, &str) -> bool + Send + Sync>;

/// Stands before the engine.
pub struct Proxy {
    port: u16,
    rule: Arc<Mutex<Rule>>,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    pub fn before(garage: &Garage) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let proxy = Self {
            port: listener.local_addr().unwrap().port(),
            rule: Arc::new(Mutex::new(Arc::new(|_: &str, _: &str| true))),
            heard: Arc::default(),
        };
        let (rule, heard) = (Arc::clone(&proxy.rule), Arc::clone(&proxy.heard));
        let engine = garage.port();
        // Ends with the test's process.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (rule, heard) = (Arc::clone(&rule), Arc::clone(&heard));
                thread::spawn(move || {
                    let _ = forward(&client, engine, &rule, &heard);
                    let _ = client.shutdown(Shutdown::Both);
                });
            }
        });
        proxy
    }

    pub fn rule(&self, rule: impl Fn(&str, &str) -> bool + Send + Sync + 'static) {
        *self.rule.lock().unwrap() = Arc::new(rule);
    }

    /// Method and path of all requests since the last time that anybody asked.
    pub fn heard(&self) -> Vec<String> {
        std::mem::take(&mut self.heard.lock().unwrap())
    }

    /// The command, to which this is the place of objects.
    pub fn command(&self, place: &Place, words: &[&str]) -> Command {
        let mut command = place.command(words);
        to_engine(&mut command, self.port);
        command
    }

    pub fn call(&self, place: &Place, words: &[&str]) -> Done {
        finished(self.command(place, words).output().unwrap())
    }
}

/// Sets the environment of a command so that this port is the place of objects.
pub fn to_engine(command: &mut Command, port: u16) {
    for proxy in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
    command
        .env("AWS_ENDPOINT", format!("http://127.0.0.1:{port}"))
        .env("AWS_ALLOW_HTTP", "true")
        .env("AWS_REGION", "garage")
        .env("AWS_ACCESS_KEY_ID", ID)
        .env("AWS_SECRET_ACCESS_KEY", SECRET);
}

fn forward(
    mut client: &TcpStream,
    engine: u16,
    rule: &Mutex<Rule>,
    heard: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut there: Option<TcpStream> = None;
    while let Some((head, length)) = head(client)? {
        let mut words = head.split(' ');
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        heard.lock().unwrap().push(format!("{method} {path}"));
        let rule = Arc::clone(&rule.lock().unwrap());
        if !rule(method, path) {
            break;
        }
        if there.is_none() {
            let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, engine))?;
            let (mut from, mut to) = (stream.try_clone()?, client.try_clone()?);
            thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
            there = Some(stream);
        }
        let there = there.as_mut().unwrap();
        there.write_all(head.as_bytes())?;
        std::io::copy(&mut (&mut client).take(length), there)?;
    }
    if let Some(there) = there {
        let _ = there.shutdown(Shutdown::Both);
    }
    Ok(())
}

/// The head of the next request, and how long its body is.
fn head(mut client: &TcpStream) -> std::io::Result<Option<(String, u64)>> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        if client.read(&mut byte)? == 0 {
            return Ok(None);
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let lines = head.lines().filter_map(|line| line.split_once(": "));
    let length = lines.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let length = length.map(|(_, value)| value.parse().unwrap()).next();
    Ok(Some((head.clone(), length.unwrap_or(0))))
}
