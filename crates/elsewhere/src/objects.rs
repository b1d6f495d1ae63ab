//! A shelf in an object store: S3, Google Cloud Storage, Azure Blob Storage.
//!
//! # Rules
//! - The runtime that the client needs is this file's own affair: it runs while a request is waited
//!   for, on the threads that wait, and at no other time.
//! - Credentials and the endpoint come from the environment, and get into no message and no record.
//! - A request that may be repeated is, for at most [`PATIENCE`]; all of ours may be, since an object
//!   is written as it is or not at all.
//! - What a server says is somebody else's: it gets into messages without control characters, and in
//!   part only.

use crate::shelf::Shelf;
use futures_util::StreamExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::{HttpError, HttpErrorKind};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientConfigKey, Error, ObjectStore, ObjectStoreExt, RetryConfig,
};
use outlive_epoch::StoreError;
use std::io::{self, ErrorKind};
use std::time::Duration;
use tokio::runtime::Runtime;

/// How long a request is repeated that gets no answer, or a server's error.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often, at most.
const REPEATS: usize = 7;
/// How long one request may take: a piece over a slow line, or a long description.
const TIMEOUT: &str = "300s";
/// Most characters of a server's answer in a message.
const LONGEST_ANSWER: usize = 300;

/// A shelf in an object store.
pub struct ObjectShelf {
    /// The URL, as records and messages have it.
    place: String,
    /// What all names begin with.
    prefix: String,
    kind: Kind,
    store: Box<dyn ObjectStore>,
    runtime: Runtime,
}

/// The protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    S3,
    Google,
    Azure,
}

/// What is to blame for a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    NotPermitted,
    NotThere,
    Unreachable,
    Other,
}

impl ObjectShelf {
    /// The shelf of a URL, `None` where its scheme is none of an object store. Nothing is asked of the
    /// place yet.
    ///
    /// # Errors
    /// What is wrong with the URL or the environment.
    pub fn open(url: &str) -> Option<Result<Self, String>> {
        let (scheme, rest) = url.split_once("://")?;
        let (kind, scheme) = match scheme {
            "s3" => (Kind::S3, scheme),
            "gs" => (Kind::Google, scheme),
            "az" | "abfs" => (Kind::Azure, "az"),
            "abfss" => (Kind::Azure, scheme),
            _ => return None,
        };
        Some(Self::of(kind, scheme, rest).map_err(|what| format!("{url}: {what}")))
    }

    fn of(kind: Kind, scheme: &str, rest: &str) -> Result<Self, String> {
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.trim_matches('/');
        if bucket.is_empty() {
            return Err(format!("write {scheme}://BUCKET/PREFIX"));
        }
        if rest.contains(['?', '#', '%', ':']) || (kind != Kind::Azure && bucket.contains('@')) {
            let what = "a bucket and a path, without any of ? # % : @; keys and endpoint belong into \
                        the environment (docs/elsewhere.md)";
            return Err(what.into());
        }
        Path::parse(prefix).map_err(|error| error.to_string())?;
        let place = format!("{scheme}://{bucket}/{prefix}");
        let place = place.trim_end_matches('/').to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| format!("no connections can be made: {error}"))?;
        // Whether it is the first one that is chosen does not matter: there is no other.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = client(kind, &place).map_err(|error| told(&error))?;
        Ok(Self {
            place,
            prefix: prefix.to_owned(),
            kind,
            store,
            runtime,
        })
    }

    fn path(&self, name: &str) -> Path {
        Path::from_iter(
            self.prefix
                .split('/')
                .chain(name.split('/'))
                .filter(|part| !part.is_empty()),
        )
    }

    /// What cannot be done with an object, and what to do about it.
    fn failed(&self, name: &str, error: &Error) -> StoreError {
        let place = format!("{}/{name}", self.place);
        let (cause, answer) = (cause(error), told(error));
        let (kind, text) = match cause {
            Cause::NotPermitted => {
                let keys = self.kind.keys();
                let text = format!(
                    "it is not permitted ({answer}); look at {keys}, and at what they may do there"
                );
                (ErrorKind::PermissionDenied, text)
            }
            Cause::NotThere => {
                let text = format!(
                    "there is no such bucket ({answer}); make it, or look at the URL and {}",
                    self.kind.endpoint()
                );
                return StoreError::Missing { place, what: text };
            }
            Cause::Unreachable => {
                let text = format!(
                    "it cannot be reached ({answer}); look at the network and {}",
                    self.kind.endpoint()
                );
                (ErrorKind::NotConnected, text)
            }
            Cause::Other => (ErrorKind::Other, answer),
        };
        StoreError::Medium {
            place,
            source: io::Error::new(kind, text),
        }
    }
}

impl Kind {
    /// Where its credentials are.
    fn keys(self) -> &'static str {
        match self {
            Self::S3 => "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            Self::Google => "GOOGLE_APPLICATION_CREDENTIALS",
            Self::Azure => "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
        }
    }

    /// Where it is said how to reach it.
    fn endpoint(self) -> &'static str {
        match self {
            Self::S3 => "AWS_ENDPOINT",
            Self::Google => "GOOGLE_BASE_URL",
            Self::Azure => "AZURE_ENDPOINT",
        }
    }
}

fn client(kind: Kind, place: &str) -> Result<Box<dyn ObjectStore>, Error> {
    let retry = RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(10),
            base: 3.0,
        },
        max_retries: REPEATS,
        retry_timeout: PATIENCE,
    };
    let unset = |name: &str| std::env::var_os(name).is_none();
    let timeout = ClientConfigKey::Timeout;
    Ok(match kind {
        Kind::S3 => {
            let mut builder = AmazonS3Builder::from_env();
            if unset("AWS_TIMEOUT") {
                builder = builder.with_config(AmazonS3ConfigKey::Client(timeout), TIMEOUT);
            }
            Box::new(builder.with_url(place).with_retry(retry).build()?)
        }
        Kind::Google => {
            let mut builder = GoogleCloudStorageBuilder::from_env();
            if unset("GOOGLE_TIMEOUT") {
                builder = builder.with_config(GoogleConfigKey::Client(timeout), TIMEOUT);
            }
            Box::new(builder.with_url(place).with_retry(retry).build()?)
        }
        Kind::Azure => {
            let mut builder = MicrosoftAzureBuilder::from_env();
            if unset("AZURE_TIMEOUT") {
                builder = builder.with_config(AzureConfigKey::Client(timeout), TIMEOUT);
            }
            Box::new(builder.with_url(place).with_retry(retry).build()?)
        }
    })
}

/// An error and what led to it, outermost first.
fn chain<'a>(error: &'a Error) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    let first: &'a (dyn std::error::Error + 'static) = error;
    std::iter::successors(Some(first), |error| error.source())
}

fn cause(error: &Error) -> Cause {
    match error {
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
            return Cause::NotPermitted;
        }
        Error::NotFound { .. } => return Cause::NotThere,
        _ => {}
    }
    for inner in chain(error) {
        if let Some(http) = inner.downcast_ref::<HttpError>() {
            return match http.kind() {
                HttpErrorKind::Decode => Cause::Other,
                _ => Cause::Unreachable,
            };
        }
    }
    // The status of a listing is told in words only.
    let text = error.to_string();
    let status = text
        .split("status code: ")
        .nth(1)
        .and_then(|rest| rest.get(..3));
    match status {
        Some("401" | "403") => Cause::NotPermitted,
        Some("404") => Cause::NotThere,
        _ => Cause::Other,
    }
}

/// What a server or the network said, in a few words.
fn told(error: &Error) -> String {
    let text = error.to_string();
    let tag = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>"))
            .map(|(inner, _)| inner)
    };
    let words = match (tag("Code"), tag("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        _ => {
            let network = chain(error).any(|inner| inner.is::<HttpError>());
            let last = chain(error).last().filter(|_| network);
            last.map_or_else(|| text.clone(), ToString::to_string)
        }
    };
    let clean = words.chars().map(|c| if c.is_control() { ' ' } else { c });
    clean
        .take(LONGEST_ANSWER)
        .collect::<String>()
        .trim()
        .to_owned()
}

impl Shelf for ObjectShelf {
    fn place(&self) -> String {
        self.place.clone()
    }

    fn len(&self, name: &str) -> Result<Option<u64>, StoreError> {
        match self.runtime.block_on(self.store.head(&self.path(name))) {
            Ok(meta) => Ok(Some(meta.size)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed(name, &error)),
        }
    }

    fn get(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let longer = || StoreError::Damaged {
            place: format!("{}/{name}", self.place),
            what: format!("it is longer than {most} bytes, which no such object is"),
        };
        let failed = |error: Error| self.failed(name, &error);
        let path = self.path(name);
        self.runtime.block_on(async {
            let found = match self.store.get(&path).await {
                Err(Error::NotFound { .. }) => return Ok(None),
                other => other.map_err(failed)?,
            };
            if found.meta.size > most {
                return Err(longer());
            }
            let mut bytes = Vec::new();
            let mut stream = found.into_stream();
            while let Some(part) = stream.next().await {
                let part = part.map_err(failed)?;
                if (bytes.len() + part.len()) as u64 > most {
                    return Err(longer());
                }
                bytes.extend_from_slice(&part);
            }
            Ok(Some(bytes))
        })
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.path(name);
        let put = self.store.put(&path, bytes.to_vec().into());
        let put = self.runtime.block_on(put);
        put.map(|_| ()).map_err(|error| self.failed(name, &error))
    }

    fn list(&self, below: &str) -> Result<Vec<String>, StoreError> {
        let path = self.path(below);
        let listed = self
            .runtime
            .block_on(self.store.list_with_delimiter(Some(&path)));
        let listed = listed.map_err(|error| self.failed(below, &error))?;
        let names = listed
            .objects
            .iter()
            .filter_map(|object| object.location.filename());
        Ok(names.map(str::to_owned).collect())
    }
}
